"""Other people's vision models: encoders, trackers, video models. Each module imports its own library, when used."""
