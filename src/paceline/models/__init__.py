"""The networks: graphs of nodes, with no knowledge of devices or losses."""
