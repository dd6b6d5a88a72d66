//! Every row of the conformance table as a test, in every datapath mode. Needs root, cgroup2, containerd and the built programs
//! (`make test` builds them).

use std::{
    process::ExitCode,
    sync::{Arc, OnceLock},
};

use edgemesh_conformance::{
    Field,
    field::{MODES, Mode},
    rows,
};
use libtest_mimic::{Arguments, Failed, Trial};

/// Rows that are played side by side: most of their time is waiting.
const THREADS: usize = 4;

type Up = OnceLock<Result<Field, String>>;

#[allow(clippy::print_stderr)]
fn main() -> ExitCode {
    let mut arguments = Arguments::from_args();
    arguments.test_threads.get_or_insert(THREADS);
    let mut good = true;
    for mode in MODES {
        let up: Arc<Up> = Arc::default();
        let outcome = libtest_mimic::run(&arguments, trials(*mode, &up));
        good &= !outcome.has_failed();
        if let Some(Ok(field)) = up.get()
            && let Err(error) = field.down()
        {
            eprintln!("the lab can't be removed: {error:#}");
            good = false;
        }
    }
    if good { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn trials(mode: Mode, up: &Arc<Up>) -> Vec<Trial> {
    let one = |(number, row): (usize, edgemesh_conformance::case::Row)| {
        let up = up.clone();
        Trial::test(format!("{}: {}", mode.name, row.name), move || {
            let field = up.get_or_init(|| Field::up_for_test("conf", mode).map_err(|error| format!("{error:#}")));
            let field = field.as_ref().map_err(|error| Failed::from(format!("the lab is not up: {error}")))?;
            row.play(field, number).map_err(|error| Failed::from(format!("{error:#}")))
        })
    };
    (1..).zip(rows::all()).map(one).collect()
}
