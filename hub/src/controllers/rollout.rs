//! The arithmetic of a Deployment's rolling update and scaling: sizes in, sizes out. No I/O.
//!
//! As Kubernetes computes them (<https://kubernetes.io/docs/concepts/workloads/controllers/deployment/>): `maxSurge` rounds up,
//! `maxUnavailable` down, and if both come out as 0 one pod may be unavailable.

use k8s_openapi::{api::apps::v1::RollingUpdateDeployment, apimachinery::pkg::util::intstr::IntOrString};

/// How far a rolling update may go above and below the wanted size, in pods.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Limits {
    pub(crate) surge: i32,
    pub(crate) unavailable: i32,
}

/// One ReplicaSet's size.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Size {
    /// Pods asked for.
    pub(crate) spec: i32,
    /// Pods that its status says are available. More than `spec` while a scale-down isn't in the status yet.
    pub(crate) status_available: i32,
}

impl Size {
    /// Pods that are available and meant to stay.
    fn available(self) -> i32 {
        self.status_available.min(self.spec)
    }
}

/// The limits for a Deployment of `replicas` pods.
pub(crate) fn limits(rolling: Option<&RollingUpdateDeployment>, replicas: i32) -> Limits {
    let quarter = IntOrString::String("25%".to_owned());
    let surge = rolling.and_then(|rolling| rolling.max_surge.as_ref()).unwrap_or(&quarter);
    let unavailable = rolling.and_then(|rolling| rolling.max_unavailable.as_ref()).unwrap_or(&quarter);
    let surge = scaled(surge, replicas, true);
    let unavailable = scaled(unavailable, replicas, false).min(replicas);
    if surge == 0 && unavailable == 0 { Limits { surge, unavailable: 1 } } else { Limits { surge, unavailable } }
}

fn scaled(value: &IntOrString, replicas: i32, up: bool) -> i32 {
    match value {
        IntOrString::Int(number) => (*number).max(0),
        IntOrString::String(text) => {
            let percent: i64 = text.trim_end_matches('%').parse().unwrap_or(0);
            let product = i64::from(replicas) * percent.clamp(0, 10_000);
            let rounded = if up { (product + 99) / 100 } else { product / 100 };
            i32::try_from(rounded).unwrap_or(i32::MAX)
        }
    }
}

/// The size that the newest ReplicaSet should have next; `total` is the sum of all sizes, the newest included.
pub(crate) fn grow_new(replicas: i32, limits: Limits, total: i32, new: i32) -> i32 {
    if new >= replicas {
        return replicas;
    }
    let room = replicas + limits.surge - total;
    if room <= 0 { new } else { new + room.min(replicas - new) }
}

/// The sizes that the old ReplicaSets (oldest first) should have next. Pods that don't serve go first; of those that do
/// only as many as leaves `replicas - maxUnavailable` available.
pub(crate) fn shrink_old(replicas: i32, limits: Limits, new: Size, old: &[Size]) -> Vec<i32> {
    let mut sizes: Vec<i32> = old.iter().map(|size| size.spec).collect();
    let total: i32 = new.spec + sizes.iter().sum::<i32>();
    let minimum = replicas - limits.unavailable;
    let may_go = total - minimum - (new.spec - new.available());
    if may_go <= 0 {
        return sizes;
    }
    let mut gone = 0;
    for (size, one) in sizes.iter_mut().zip(old) {
        let broken = (*size - one.available()).min(may_go - gone).max(0);
        *size -= broken;
        gone += broken;
    }
    let available: i32 = new.available() + old.iter().map(|one| one.available()).sum::<i32>();
    let mut spare = (available - minimum).max(0);
    for size in &mut sizes {
        let less = (*size).min(spare);
        *size -= less;
        spare -= less;
    }
    sizes
}

/// The sizes after the Deployment was scaled in the middle of a rollout: the change is spread over the ReplicaSets in proportion
/// to their sizes, the rounding goes to the largest. `before` is what each one's total limit was (its annotation).
pub(crate) fn spread(replicas: i32, limits: Limits, sets: &[(i32, Option<i32>)], status_replicas: i32) -> Vec<i32> {
    let total: i32 = sets.iter().map(|(size, _)| *size).sum();
    let allowed = if replicas > 0 { replicas + limits.surge } else { 0 };
    let change = allowed - total;
    let mut sizes: Vec<i32> = sets.iter().map(|(size, _)| *size).collect();
    // Largest first; among equals the newest first when growing, the oldest first when shrinking (sets are oldest first).
    let mut order: Vec<usize> = (0..sets.len()).collect();
    if change > 0 {
        order.sort_by_key(|at| (std::cmp::Reverse(sets[*at].0), std::cmp::Reverse(*at)));
    } else {
        order.sort_by_key(|at| (std::cmp::Reverse(sets[*at].0), *at));
    }
    let mut added = 0;
    for at in &order {
        let (size, before) = sets[*at];
        if change == 0 || size == 0 {
            continue;
        }
        let before = before.filter(|before| *before > 0).unwrap_or(status_replicas).max(1);
        let scaled = (f64::from(size) * f64::from(allowed) / f64::from(before)).round();
        #[expect(clippy::cast_possible_truncation, reason = "a float cast saturates, and sizes are small")]
        let fraction = scaled as i32 - size;
        let left = change - added;
        let step = if change > 0 { fraction.min(left).max(0) } else { fraction.max(left).min(0) };
        sizes[*at] = (size + step).max(0);
        added += sizes[*at] - size;
    }
    if let Some(first) = order.first() {
        sizes[*first] = (sizes[*first] + change - added).max(0);
    }
    sizes
}

#[cfg(test)]
mod tests {
    use super::*;

    fn percent(surge: &str, unavailable: &str) -> RollingUpdateDeployment {
        RollingUpdateDeployment {
            max_surge: Some(IntOrString::String(surge.into())),
            max_unavailable: Some(IntOrString::String(unavailable.into())),
        }
    }

    #[test]
    fn surge_rounds_up_unavailable_rounds_down_and_one_of_them_is_never_zero() {
        assert_eq!(limits(None, 4), Limits { surge: 1, unavailable: 1 });
        assert_eq!(limits(None, 3), Limits { surge: 1, unavailable: 0 });
        assert_eq!(limits(Some(&percent("25%", "25%")), 10), Limits { surge: 3, unavailable: 2 });
        assert_eq!(limits(Some(&percent("0%", "0%")), 10), Limits { surge: 0, unavailable: 1 });
        assert_eq!(limits(Some(&percent("0", "100%")), 5).unavailable, 5);
    }

    /// Plays a rollout in which pods become available one by one, in the worst order, and checks the bounds at every step.
    fn play(replicas: i32, rolling: &RollingUpdateDeployment) {
        let limits = limits(Some(rolling), replicas);
        let mut old = Size { spec: replicas, status_available: replicas };
        let mut new = Size { spec: 0, status_available: 0 };
        for _ in 0..10_000 {
            new.spec = grow_new(replicas, limits, old.spec + new.spec, new.spec);
            assert!(old.spec + new.spec <= replicas + limits.surge, "too many: {old:?} {new:?}");
            // The status of the old set is stale: it still counts what was scaled away.
            old.spec = shrink_old(replicas, limits, new, &[old])[0];
            let serving = old.available() + new.available();
            assert!(serving >= replicas - limits.unavailable, "too few: {old:?} {new:?}");
            if old.spec == 0 && new.status_available == replicas {
                return;
            }
            if new.status_available < new.spec {
                new.status_available += 1;
            } else {
                old.status_available = old.spec;
            }
        }
        panic!("never ends: {old:?} {new:?}");
    }

    #[test]
    fn a_rolling_update_stays_within_its_limits_at_every_step_and_ends() {
        for replicas in 1..=12 {
            for (surge, unavailable) in [("25%", "25%"), ("100%", "0%"), ("0%", "50%"), ("0%", "0%"), ("1%", "99%")] {
                play(replicas, &percent(surge, unavailable));
            }
        }
    }

    #[test]
    fn broken_old_pods_go_first_and_do_not_cost_availability() {
        let limits = Limits { surge: 1, unavailable: 0 };
        let new = Size { spec: 1, status_available: 1 };
        let old = [Size { spec: 2, status_available: 0 }, Size { spec: 1, status_available: 1 }];
        // Three wanted, two serve: none of the serving may go; one broken may.
        assert_eq!(shrink_old(3, limits, new, &old), [1, 1]);
    }

    #[test]
    fn scaling_during_a_rollout_keeps_the_proportions() {
        let limits = Limits { surge: 3, unavailable: 2 };
        // The example of the Kubernetes documentation: 10 + 3 pods, 8 old and 5 new; scaled to 15.
        let sizes = spread(15, limits, &[(8, Some(13)), (5, Some(13))], 13);
        assert_eq!(sizes, [11, 7]);
        assert_eq!(sizes.iter().sum::<i32>(), 18);
        let sizes = spread(0, limits, &[(8, Some(13)), (5, Some(13))], 13);
        assert_eq!(sizes, [0, 0]);
    }
}
