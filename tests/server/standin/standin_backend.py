"""A backend without an engine, for tests of what surrounds one: streams the words of its prompt.

model.json: `delay_s` between words, `load_s` to wait while loading, `fail` to refuse loading with that message,
`log` to write that line while loading.
"""

import json
import sys
import threading
import time
from pathlib import Path

import numpy as np
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    @staticmethod
    def auto_complete_config(config):
        config.set_max_batch_size(0)
        config.set_model_transaction_policy({"decoupled": True})
        config.add_input({"name": "text_input", "data_type": "TYPE_STRING", "dims": [1]})
        config.add_output({"name": "text_output", "data_type": "TYPE_STRING", "dims": [-1]})
        return config

    def initialize(self, args):
        folder = Path(args["model_repository"]) / args["model_version"]
        self.settings = json.loads((folder / "model.json").read_text())
        print(self.settings.get("log", ""), file=sys.stderr, flush=True)
        time.sleep(self.settings.get("load_s", 0))
        if self.settings.get("fail"):
            raise pb_utils.TritonModelException(self.settings["fail"])

    def execute(self, requests):
        for request in requests:
            text = pb_utils.get_input_tensor_by_name(request, "text_input").as_numpy()[0].decode()
            threading.Thread(target=self.stream, args=(request.get_response_sender(), text), daemon=True).start()

    def stream(self, sender, text):
        for word in text.split(" "):
            tensor = pb_utils.Tensor("text_output", np.array([word.encode()], dtype=object))
            sender.send(pb_utils.InferenceResponse([tensor]))
            time.sleep(self.settings.get("delay_s", 0.01))
        sender.send(flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
