"""Native: what OpenCV and numpy do too slowly on pixels, compiled, with a fallback where there is no compiler."""
