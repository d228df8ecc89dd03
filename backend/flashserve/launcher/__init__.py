"""Starts, watches and ends a tritonserver that hosts flashserve models. Never imports torch.

``serve.py`` is the order of events; the modules around it know one thing each and do not know each other:
where tritonserver is (``discover``), which models (``repository``), the temporary backend folder
(``workspace``), the child process and its log (``process``), Triton's HTTP control API (``control``), stubs
that died (``stubs``), and the end of everything that was started (``reaper``).
"""
