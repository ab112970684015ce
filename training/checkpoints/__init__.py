"""Training state as verified files in a store, written by every worker while training goes on."""
