"""How much memory there is, how much a model needs and was found to take, and who has it booked."""
