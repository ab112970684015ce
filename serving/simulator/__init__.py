"""Replays a trace of requests against a scaling policy: `tandem simulate`."""
