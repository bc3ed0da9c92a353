"""`lit-prune serve`: between the network and transformers' server, requests are checked, counted and limited."""
