"""Tests of `pyro_subnet/training`."""
