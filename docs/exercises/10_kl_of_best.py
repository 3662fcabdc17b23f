"""Exercise 10: how far the best of n answers is from the policy that wrote them."""


def kl_of_best(n: int) -> float:
    """KL(best of n || policy), in nats, where no two answers have the same reward."""
    raise NotImplementedError
