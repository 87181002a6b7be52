"""What piecewise sparse attention is compared with: one file per method, each only a new order, routing or tail."""
