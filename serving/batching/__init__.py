"""Batching to a deadline: which requests are let in, and which run together next.

    latency     how long a batch takes, learned from those that ran
    ticket      a request in the queue; priorities
    backlog     what waits, by deadline: whether all of it can still be met
    planner     the queue, and the next batch cut from it
    door        whether a request can be met at all, before it is queued
    form        which tensors may share a batch; padding, and cutting outputs back
    model       a runtime with its form and its latency, measured once at load
    run         one batch, in a thread: an outcome for each request
    executor    the only part with an event loop: it obeys the others

The order is: take the slot, then cut the batch. An idle model runs a single request at once; while it is
busy, requests gather and leave together. (A batcher that closes batches while the model is busy, as
`@serve.batch` does, keeps them small exactly when they should grow.)
"""
