"""Ways to hold a posterior's curvature, each ready for any prior precision."""
