"""How training images are varied, so that a model sees more than there are."""

from pipeline.section import Section


class Augmentation(Section):
    """The recipe's [augmentation]."""

    horizontal_flip: bool = False
