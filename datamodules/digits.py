"""scikit-learn's handwritten digits: 1,797 real 8×8 images that come with the package."""

import torch

from datamodules.images import ByteImages, ImageDataModule


class Digits(ImageDataModule):
    """1,500 training images, 148 for validation and 149 for the test, by a fixed shuffle.

    FID compares with the 1,500 training images, because the held-out ones are too few for a covariance; its floor is
    that of the 149 test images, and high for want of them. Arguments are those of `ImageDataModule`.

    References:
        | E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, UCI, 1998
    """

    shape = (1, 8, 8)
    class_names = tuple("0123456789")
    sigma_data = 0.7514
    reference_split = "train"
    sizes = {"train": 1500, "val": 148, "test": 149}

    @property
    def fingerprint(self):
        return [*super().fingerprint, self.sizes]

    def read_split(self, split):
        from sklearn.datasets import load_digits

        digits = load_digits()
        images = torch.from_numpy(digits.images)[:, None]
        images = (images * 255 / 16).round().to(torch.uint8)
        labels = torch.from_numpy(digits.target).long()
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
        rows = dict(zip(self.sizes, order.split(list(self.sizes.values()))))[split]
        return ByteImages(images[rows], labels[rows])
