"""Who trains: a coordinator decides, keepers fork training processes, Ray Train holds the resources."""
