"""The merge engine: plan, survey, and the same jitted step streamed from disk or on arrays that live on devices."""
