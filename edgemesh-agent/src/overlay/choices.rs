//! What the rules choose of each Service port while nothing is passed over: the same for all connections until the catalog changes,
//! so that a connection doesn't pay for the number of endpoints.

use std::{
    collections::HashMap,
    sync::{Arc, Weak},
};

use edgemesh_mesh::{Candidates, Catalog, IpFamily};
use parking_lot::Mutex;

use crate::node_local::ServicePortName;

/// The choices that were needed since the catalog changed last.
#[derive(Debug, Default)]
pub(super) struct Choices(Mutex<Kept>);

#[derive(Debug, Default)]
struct Kept {
    /// Whose choices they are. It isn't kept alive, and no other catalog has its address as long as this points there.
    catalog: Weak<Catalog>,
    v4: HashMap<ServicePortName, Arc<Candidates>>,
    v6: HashMap<ServicePortName, Arc<Candidates>>,
}

impl Choices {
    /// The choice of a Service port for calls of a family, made by `choose` if it is not known.
    pub(super) fn of(
        &self,
        catalog: &Arc<Catalog>,
        port: &ServicePortName,
        family: IpFamily,
        choose: impl FnOnce() -> Candidates,
    ) -> Arc<Candidates> {
        let mut kept = self.0.lock();
        if kept.catalog.as_ptr() != Arc::as_ptr(catalog) {
            *kept = Kept { catalog: Arc::downgrade(catalog), ..Kept::default() };
        }
        let choices = match family {
            IpFamily::V4 => &mut kept.v4,
            IpFamily::V6 => &mut kept.v6,
        };
        if let Some(known) = choices.get(port) {
            return Arc::clone(known);
        }
        let made = Arc::new(choose());
        choices.insert(port.clone(), Arc::clone(&made));
        made
    }
}

#[cfg(test)]
mod tests {
    use edgemesh_mesh::{
        Tier,
        model::{Protocol, ServiceName},
    };

    use super::*;

    #[test]
    fn a_choice_is_made_once_for_each_port_and_family_and_anew_for_another_catalog() {
        let choices = Choices::default();
        let port = |name: &str| ServicePortName {
            service: ServiceName { namespace: "default".into(), name: "web".into() },
            port: name.into(),
            protocol: Protocol::Tcp,
        };
        let mut made = 0;
        let mut of = |catalog: &Arc<Catalog>, name: &str, family: IpFamily| {
            choices.of(catalog, &port(name), family, || {
                made += 1;
                Candidates { tier: Tier::Node, endpoints: Vec::new(), spilled: false }
            });
            made
        };
        let first = Arc::new(Catalog::default());
        assert_eq!(of(&first, "http", IpFamily::V4), 1);
        assert_eq!(of(&first, "http", IpFamily::V4), 1);
        assert_eq!(of(&first, "http", IpFamily::V6), 2);
        assert_eq!(of(&first, "admin", IpFamily::V4), 3);
        drop(first);
        let second = Arc::new(Catalog::default());
        assert_eq!(of(&second, "http", IpFamily::V4), 4);
    }
}
