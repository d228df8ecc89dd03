"""Load tests of LLM servers on Locust: `flashserve bench`, or `locust -f` with the users of `loadtest.users`.

record, histogram, statistics   what is measured, and how it adds up
lengths, corpus, workload       what is asked
arrivals, traces                when
streams                         one request in a protocol: Triton's HTTP and gRPC, OpenAI's SSE
users, run, locustfile          the same on Locust, in one process or several
scrape, report                  the server's side of it, and the pages at the end
settings, command, live         the options, `flashserve bench`, and its view in a terminal
"""
