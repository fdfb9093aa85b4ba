"""How the files of a set of shards are reached: mounted, fetched through a cache, or staged on the node."""
