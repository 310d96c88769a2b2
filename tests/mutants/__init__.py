"""Deliberate mistakes in the code of concurrency and durability, each of which the simulation must find."""
