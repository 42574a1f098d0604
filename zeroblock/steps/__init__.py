"""Steps of an op that can be done in several ways: convolutions and linear layers, with or without a norm before."""
