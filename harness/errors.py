"""The one error that is the user's to mend."""


class InputError(Exception):
    """Bad input, said in one sentence that tells what to do; the command line prints it and exits with 2."""

    def __init__(self, *sentences: str):
        super().__init__("\n".join(sentences))
        self.sentences = sentences
