"""Structured output: from what a request asks of its text's form to the tokens that it may choose next.

``service.py`` compiles beside the steps, ``matcher.py`` follows one sequence, ``judge.py`` tries a grammar in a process
of its own first, ``source.py`` writes it as llguidance reads it.
"""
