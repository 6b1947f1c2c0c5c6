"""Native: what OpenCV, numpy and Python do too slowly, compiled, with a fallback where there is no compiler."""
