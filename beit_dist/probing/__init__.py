"""What frozen features are worth: linear and nearest-neighbour probes of every layer of a backbone."""
