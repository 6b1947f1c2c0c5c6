"""From raw outputs to detections, and from detections to COCO's figures."""
