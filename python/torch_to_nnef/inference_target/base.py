"""What every inference target has in common."""


class InferenceTarget:
    """An engine that archives are written for. Subclasses are frozen dataclasses of its options.

    version: the engine version the archive is written for.
    check_io: run the archive after the export and compare its outputs with torch's.
    """

    version: str
    check_io: bool
