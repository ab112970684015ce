"""From Parquet to batches, in an order that is a pure function, and the proof that every row came once."""
