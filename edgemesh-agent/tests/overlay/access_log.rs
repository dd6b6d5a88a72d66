//! The access log of all tests in this process, as fields.

use std::{
    collections::BTreeMap,
    fmt::Debug,
    sync::{Mutex, OnceLock},
};

use tracing::{
    Event, Metadata, Subscriber,
    field::{Field, Visit},
    span,
};

/// The fields of a line.
pub(crate) type Line = BTreeMap<&'static str, String>;

/// Keeps the lines of the access log, of all tests in this process.
#[derive(Default)]
pub(crate) struct AccessLog(Mutex<Vec<Line>>);

struct Fields<'a>(&'a mut Line);

impl Visit for Fields<'_> {
    fn record_debug(&mut self, field: &Field, value: &dyn Debug) {
        self.0.insert(field.name(), format!("{value:?}"));
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        self.0.insert(field.name(), value.to_owned());
    }
}

impl Subscriber for &'static AccessLog {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.target() == "access"
    }

    fn event(&self, event: &Event<'_>) {
        let mut line = Line::new();
        event.record(&mut Fields(&mut line));
        self.0.lock().unwrap().push(line);
    }

    fn new_span(&self, _: &span::Attributes<'_>) -> span::Id {
        span::Id::from_u64(1)
    }

    fn record(&self, _: &span::Id, _: &span::Record<'_>) {}
    fn record_follows_from(&self, _: &span::Id, _: &span::Id) {}
    fn enter(&self, _: &span::Id) {}
    fn exit(&self, _: &span::Id) {}
}

impl AccessLog {
    /// Begins to listen, if nobody has.
    pub(crate) fn start() -> &'static Self {
        static LOG: OnceLock<AccessLog> = OnceLock::new();
        static LISTENING: OnceLock<()> = OnceLock::new();
        let log = LOG.get_or_init(Self::default);
        LISTENING.get_or_init(|| tracing::subscriber::set_global_default(log).unwrap());
        log
    }

    /// The lines in which a field has a value.
    pub(crate) fn with(&self, field: &str, value: &str) -> Vec<Line> {
        let all = self.0.lock().unwrap();
        all.iter().filter(|line| line.get(field).is_some_and(|found| found == value)).cloned().collect()
    }
}

/// Checks some fields of a line.
pub(crate) fn says(line: &Line, wanted: &[(&str, &str)]) {
    for (field, value) in wanted {
        assert_eq!(line.get(field).map(String::as_str), Some(*value), "{field} in {line:?}");
    }
}
