"""The Open Inference Protocol over gRPC: a gateway that turns it into the same protocol over HTTP."""
