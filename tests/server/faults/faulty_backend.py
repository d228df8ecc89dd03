"""The real backend with faults in it: a prompt that ends in one of these tokens breaks the part it stands for."""

from flashserve.frontend.lifecycle import TritonPythonModel as SoundModel

BREAKS_PARSER, BREAKS_TEXT, BREAKS_STEP = 301, 302, 303
SECRET = "/etc/flashserve/secret.key is missing"


def break_stub() -> None:
    from flashserve.frontend import service

    parse, completion = service.parse, service.Completion

    def faulty_parse(*args):
        parsed = parse(*args)
        if parsed.message.prompt_token_ids[-1] == BREAKS_PARSER:
            raise RuntimeError(SECRET)
        return parsed

    class FaultyCompletion(completion):
        def __init__(self, tokenizer, request):
            super().__init__(tokenizer, request)
            self.broken = request.prompt_token_ids[-1] == BREAKS_TEXT

        def take(self, output):
            if self.broken:
                raise RuntimeError(SECRET)
            return super().take(output)

    service.parse, service.Completion = faulty_parse, FaultyCompletion


class TritonPythonModel(SoundModel):
    def initialize(self, args):
        break_stub()
        super().initialize(args)
