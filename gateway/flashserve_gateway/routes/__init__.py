"""The endpoints, one file per kind; each has `routes(gateway)`, which makes its router."""
