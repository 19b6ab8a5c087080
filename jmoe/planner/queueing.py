"""Waiting in one first-in-first-out queue: exactly from drawn arrivals, and by Kingman's formula. No JAX."""

import numpy as np
from numpy.typing import ArrayLike


def waits_s(arrival_s: np.ndarray, service_s: np.ndarray) -> np.ndarray:
    """How long each arrival waits for the server (Lindley's recursion, vectorised).

    With S the running sum of service times, the work of i starts at max over j <= i of arrival_j + S_i-1 - S_j-1.

    Args:
      arrival_s: `[n]` not decreasing.
      service_s: `[n]`.

    Returns:
      `[n]` seconds.
    """
    before = np.cumsum(service_s) - service_s
    return np.maximum.accumulate(arrival_s - before) + before - arrival_s


def kingman_wait_s(utilisation: ArrayLike, service_s: ArrayLike, arrival_cv2: ArrayLike, service_cv2: ArrayLike):
    """Kingman's approximation of the mean wait in a G/G/1 queue: rho / (1 - rho) * (c_a^2 + c_s^2) / 2 * service.

    Exact for Poisson arrivals (Pollaczek-Khinchine), an upper-side approximation in heavy traffic otherwise.

    Args:
      utilisation: rho, at least 0 and below 1.
      service_s: mean service time.
      arrival_cv2, service_cv2: squared coefficients of variation of the times between arrivals and of service.

    Returns:
      The mean wait in seconds, broadcast over the arguments.

    Raises:
      ValueError: a utilisation out of range.

    Source: J. F. C. Kingman, The single server queue in heavy traffic, 1961.
    """
    rho = np.asarray(utilisation, np.float64)
    if not ((rho >= 0) & (rho < 1)).all():
        raise ValueError(f"kingman_wait_s.utilisation: expected 0 <= rho < 1, got {utilisation}")
    return rho / (1 - rho) * (np.asarray(arrival_cv2) + np.asarray(service_cv2)) / 2 * np.asarray(service_s)
