"""How fast is it beside its peers, on this machine's CPU?"""
