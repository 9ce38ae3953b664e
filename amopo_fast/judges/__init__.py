"""Who scores answers: a program, a server that speaks OpenAI's protocol, or a reward model."""
