"""Starts, watches and ends a tritonserver that hosts flashserve models. Never imports torch.

``serve`` prepares a run, ``lives`` keeps a tritonserver alive in it, and ``ending`` ends it. Around them:

- before the start: where tritonserver is (``discover``), which models (``repository``), whether they can be loaded
  (``loadable``), ports (``ports``), arguments for Triton (``triton_arguments``), the run's folder (``workspace``), and
  what may reach the shell that starts stubs (``shell_words``);
- the child: its process and log (``process``, ``log_lines``, ``log_flood``), its HTTP control API (``control``);
- while it lives: whether it answers (``health``), stubs that died and loads that cannot end (``stubs``), models brought
  back (``reloads``), how often to start anew (``restarts``), processes without a parent (``orphans``);
- the end: signals (``signals``), and everything that was started (``reaper``, also when the launcher is killed).

``doctor`` and ``trace`` are commands of their own; ``commands`` is the command line, ``console`` what the user sees.
"""
