"""What FL-I2MoE is said to do, measured here: experiments whose rows make docs/findings.md."""
