"""Many models in one replica: which of them are loaded (`budget`), loading and evicting them (`pool`), and
what answers in front of them (`app`, `server`)."""
