"""lm-evaluation-harness's side: what is asked, and our model as one of its back ends."""
