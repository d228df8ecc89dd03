"""The real backend with faults in it: a prompt that ends in one of these tokens breaks the part it stands for."""

from flashserve.frontend.lifecycle import TritonPythonModel as SoundModel

BREAKS_PARSER, BREAKS_TEXT, BREAKS_STEP = 301, 302, 303
SECRET = "/etc/flashserve/secret.key is missing"


def break_stub() -> None:
    from flashserve.frontend import service

    parse, text_stream = service.parse, service.TextStream

    def faulty_parse(request, context):
        parsed = parse(request, context)
        if parsed.prompt_token_ids[-1] == BREAKS_PARSER:
            raise RuntimeError(SECRET)
        return parsed

    class FaultyTextStream(text_stream):
        def __init__(self, *args, prompt_tail, **kwargs):
            super().__init__(*args, prompt_tail=prompt_tail, **kwargs)
            self.broken = prompt_tail[-1] == BREAKS_TEXT

        def push(self, *args):
            if self.broken:
                raise RuntimeError(SECRET)
            return super().push(*args)

    service.parse, service.TextStream = faulty_parse, FaultyTextStream


class TritonPythonModel(SoundModel):
    def initialize(self, args):
        break_stub()
        super().initialize(args)
