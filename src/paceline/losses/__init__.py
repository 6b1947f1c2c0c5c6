"""From raw outputs and ground truth to sums that can be differentiated."""
