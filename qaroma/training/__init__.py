"""Training: setup builds a session, fit runs the loop, run is the whole job."""
