"""The output of OpenAI's Responses API: items, and the events that build them up."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from .chat import new_call_id
from .output.events import CallArguments, CallStart, Event, Reasoning

Fields = dict[str, Any]


class ItemWriter:
    """Makes items of what a model writes, one after another. `items` are those that began, complete after `close`."""

    def __init__(self, answer_id: str, parallel_calls: bool) -> None:
        self.items: list[Fields] = []
        self._answer_id = answer_id
        self._parallel = parallel_calls
        self._is_open = False
        self._calls = 0

    def write(self, events: Iterable[Event]) -> list[Fields]:
        """The API's events of these."""
        return [field for event in events for field in self._write(event)]

    def close(self, status: str = "completed") -> list[Fields]:
        """Ends the item that is being written."""
        if not self._is_open:
            return []
        self._is_open = False
        item, where = self.items[-1], self._where()
        item["status"] = status
        done: list[Fields] = []
        if item["type"] == "function_call":
            item["arguments"] = item["arguments"] or "{}"
            done.append({"type": "response.function_call_arguments.done", **where, "name": item["name"],
                         "arguments": item["arguments"]})  # fmt: skip
        else:
            part = item["content"][0]
            kind = "output_text" if item["type"] == "message" else "reasoning_text"
            logprobs: Fields = {"logprobs": []} if item["type"] == "message" else {}
            done.append(
                {"type": f"response.{kind}.done", **where, "content_index": 0, "text": part["text"], **logprobs}
            )
            done.append({"type": "response.content_part.done", **where, "content_index": 0, "part": dict(part)})
        done.append({"type": "response.output_item.done", "output_index": where["output_index"], "item": _copy(item)})
        return done

    def _write(self, event: Event) -> list[Fields]:
        if isinstance(event, CallStart):
            self._calls += 1
        if isinstance(event, CallStart | CallArguments) and self._calls > 1 and not self._parallel:
            return []
        if isinstance(event, CallStart):
            call_id = new_call_id()
            item = {"type": "function_call", "id": f"fc_{call_id}", "call_id": f"call_{call_id}", "name": event.name}
            return [*self.close(), *self._add({**item, "arguments": "", "status": "in_progress"})]
        if isinstance(event, CallArguments):
            self.items[-1]["arguments"] += event.text
            return [{"type": "response.function_call_arguments.delta", **self._where(), "delta": event.text}]
        if isinstance(event, Reasoning):
            part: Fields = {"type": "reasoning_text", "text": ""}
            return self._text(event.text, "reasoning", part, {"summary": []}, {})
        part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
        return self._text(event.text, "message", part, {"role": "assistant"}, {"logprobs": []})

    def _text(self, text: str, kind: str, part: Fields, fields: Fields, extra: Fields) -> list[Fields]:
        begun: list[Fields] = []
        if not self._is_open or self.items[-1]["type"] != kind:
            prefix = "msg" if kind == "message" else "rs"
            item = {"type": kind, "id": f"{prefix}_{self._answer_id}_{len(self.items)}", **fields}
            begun = [*self.close(), *self._add({**item, "status": "in_progress", "content": []})]
            begun.append(
                {"type": "response.content_part.added", **self._where(), "content_index": 0, "part": dict(part)}
            )
            self.items[-1]["content"] = [part]
        self.items[-1]["content"][0]["text"] += text
        name = f"response.{self.items[-1]['content'][0]['type']}.delta"
        return [*begun, {"type": name, **self._where(), "content_index": 0, "delta": text, **extra}]

    def _add(self, item: Fields) -> list[Fields]:
        self.items.append(item)
        self._is_open = True
        return [{"type": "response.output_item.added", "output_index": len(self.items) - 1, "item": _copy(item)}]

    def _where(self) -> Fields:
        return {"output_index": len(self.items) - 1, "item_id": self.items[-1]["id"]}


def _copy(item: Fields) -> Fields:
    """As it is now: items grow while their events wait to be sent."""
    return {name: [dict(part) for part in value] if name == "content" else value for name, value in item.items()}
