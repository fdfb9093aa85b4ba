"""``llamagen check``: what a cluster's nodes are like, tried out by a short job before anything long is launched."""
