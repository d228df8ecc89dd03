"""Load tests of LLM servers on Locust: `flashserve bench`, or `locust -f` with the users of `loadtest.users`.

record, histogram, statistics   what is measured, and how it adds up
lengths, workload, corpus.txt   what is asked
arrivals, traces                when
streams                         one request in a protocol: Triton's HTTP and gRPC, OpenAI's SSE
generator, director             a process' share of a run; the start and end of a run, over all processes
users, locustfile, web          the same on Locust, and what its web page shows of it
scrape, outcome, report         the server's side of it, whether it was good, and the page at the end
settings, interface             the options, and what the processes of a run agree on
command, live, search, trials   `flashserve bench`, its view in a terminal, its search for a limit
demonstration, ceiling          `make loadtest`; how much load a process makes
"""
