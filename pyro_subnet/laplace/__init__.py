"""The posterior in numbers: state, evidence, tuning."""
