"""How the voxels of a volume become slices as radiologists look at them, and the way back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from nibabel import orientations
from numpy.typing import NDArray

Array = NDArray[Any]
Plane = Literal["axial", "coronal", "sagittal", "stored"]

# axis of RAS along which a plane cuts, then the axes of the picture's rows and columns
_PLANES: dict[str, tuple[int, int, int]] = {
    "axial": (2, 1, 0),
    "coronal": (1, 2, 0),
    "sagittal": (0, 2, 1),
}


def axis_letters(plane: Plane) -> str | None:
    """Whither an index of a picture's rows, its columns and the slices grows: PLS of an axial cut.

    Rows and columns run against RAS, slices with it, see `Cut`. None for `stored`, which knows no
    directions.
    """
    if plane not in _PLANES:
        return None
    slices, rows, columns = _PLANES[plane]
    return "LPI"[rows] + "LPI"[columns] + "RAS"[slices]


@dataclass(frozen=True, slots=True, eq=False)
class Cut:
    """A volume's way from its file's voxels (I, J, K) to slices (D, H, W), and back.

    The voxel axes are permuted and flipped to RAS, as closely as they lie, then a plane is cut:
    anterior or superior is at the top of a picture, the patient's right (sagittal: anterior) at its
    left. Both ways only permute and flip, so no value changes.

    The plane `stored` turns nothing: slice k is the file's [:, :, k], with rows along its first
    axis, as FedFMS slices its volumes. What is said of RAS here is then of the file's own axes.
    """

    orientation: Array  # (3, 2) of nibabel: RAS axis and direction of each axis of the file
    axes: tuple[int, int, int]  # RAS axes of slices, rows and columns
    affine: Array  # (4, 4) float64 of the volume in RAS, mm
    shape: tuple[int, int, int]  # of the volume in RAS
    turned: bool = True  # rows and columns run against RAS; False: as stored

    @classmethod
    def of(cls, affine: Array, shape: tuple[int, ...], plane: Plane) -> Cut:
        """The cut of a volume with this RAS affine (4, 4) and shape (I, J, K).

        A single slice, however it lies, is cut as it was taken.
        """
        if plane == "stored":
            own = np.array([[0, 1], [1, 1], [2, 1]])
            return cls(own, (2, 0, 1), affine, (shape[0], shape[1], shape[2]), turned=False)
        orientation = orientations.io_orientation(affine)
        to_ras = orientations.inv_ornt_aff(orientation, shape)
        ras_shape = [0, 0, 0]
        for axis in range(3):
            ras_shape[int(orientation[axis, 0])] = shape[axis]
        single = [axis for axis in range(3) if ras_shape[axis] == 1]
        axes = _PLANES[plane]
        if len(single) == 1:
            axes = next(known for known in _PLANES.values() if known[0] == single[0])
        return cls(orientation, axes, affine @ to_ras, (ras_shape[0], ras_shape[1], ras_shape[2]))

    @classmethod
    def of_picture(cls, affine: Array, shape: tuple[int, ...]) -> Cut:
        """The cut of a picture without a place, (I, J, 1) of columns and rows: as it is shown."""
        own = np.array([[0, 1], [1, 1], [2, 1]])
        return cls(own, (2, 1, 0), affine, (shape[0], shape[1], shape[2]), turned=False)

    @classmethod
    def onto(cls, affine: Array, shape: tuple[int, ...], other: Cut) -> Cut | None:
        """The cut that puts a volume's voxels on those of another volume, one on one.

        Headers round, so at 45 degrees two files of one grid may be nearest to different axes of
        the body; a label goes with its image.

        Returns:
            None where the two grids are not one, within half a voxel at every corner.
        """
        steps = np.linalg.inv(other.affine)[:3, :3] @ affine[:3, :3]
        whole = np.rint(steps)
        if not (np.abs(whole).sum(axis=0) == 1).all() or abs(np.linalg.det(whole)) != 1:
            return None
        axis = np.abs(whole).argmax(axis=0)
        orientation = np.column_stack([axis, whole[axis, range(3)]])
        turned = tuple(shape[number] for number in np.argsort(axis))
        placed = affine @ orientations.inv_ornt_aff(orientation, shape)
        if turned != other.shape or not same_grid(placed, other.affine, other.shape):
            return None
        return cls(orientation, other.axes, placed, other.shape)

    @property
    def spacing(self) -> tuple[float, float, float]:
        """Millimetres between slices, rows and columns."""
        sizes = np.linalg.norm(self.affine[:3, :3], axis=0)
        slices, rows, columns = (float(sizes[axis]) for axis in self.axes)
        return slices, rows, columns

    def slices(self, voxels: Array) -> Array:
        """(I, J, K) in the file's order to (D, H, W); a view."""
        ras = orientations.apply_orientation(voxels, self.orientation)
        slices = np.asarray(ras).transpose(self.axes)
        return slices[:, ::-1, ::-1] if self.turned else slices

    def voxels(self, slices: Array) -> Array:
        """(D, H, W) to (I, J, K) in the file's order: undoes `slices`."""
        turned = slices[:, ::-1, ::-1] if self.turned else slices
        ras = turned.transpose(np.argsort(self.axes))
        back = orientations.ornt_transform(np.array([[0, 1], [1, 1], [2, 1]]), self.orientation)
        return np.asarray(orientations.apply_orientation(ras, back))


def largest_shift(one: Array, other: Array, shape: Sequence[int]) -> float:
    """Millimetres between the two positions of a grid's corner, at the worst corner."""
    corners = np.array(
        [
            [i, j, k, 1]
            for i in (0, shape[0] - 1)
            for j in (0, shape[1] - 1)
            for k in (0, shape[2] - 1)
        ]
    )
    return float(np.linalg.norm((corners @ (one - other).T)[:, :3], axis=1).max())


def same_grid(one: Array, other: Array, shape: Sequence[int]) -> bool:
    """Whether no voxel lies more than half a voxel apart under two affines (4, 4), mm."""
    sizes = np.linalg.norm(other[:3, :3], axis=0)
    return largest_shift(one, other, shape) <= 0.5 * float(sizes.min())
