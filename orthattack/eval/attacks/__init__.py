"""The attacks that an evaluation can run, by name: ours, Foolbox's, torchattacks', a user's."""
