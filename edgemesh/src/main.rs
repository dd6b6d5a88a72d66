//! `edgemesh`: asks the agent of this node what Services there are, what names resolve to, and where calls go, and why.

mod agent;
mod show;
mod table;

use std::{io::Write, process::ExitCode};

use clap::{Parser, Subcommand, ValueEnum, error::ErrorKind};

use agent::{Agent, AgentError};

/// The command line can't be used (sysexits.h, EX_USAGE).
const USAGE: u8 = 64;

/// Explains the mesh from the live state of this node's agent.
///
/// Exit codes: 0; 1 when something isn't found, no endpoint is chosen, or the agent doesn't answer; 64 when the command can't be used.
#[derive(Parser)]
#[command(name = "edgemesh", version)]
struct Arguments {
    /// The agent's admin endpoint.
    #[arg(long, env = "EDGEMESH_AGENT", default_value = "http://127.0.0.1:9442", global = true, value_name = "URL")]
    agent: String,
    /// How to print.
    #[arg(short, long, value_enum, default_value_t = Format::Table, global = true)]
    output: Format,
    #[command(subcommand)]
    action: Action,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Format {
    /// Aligned columns.
    Table,
    /// What the agent says.
    Json,
}

#[derive(Subcommand)]
enum Action {
    /// List Services with their endpoints as this node sees them.
    Services {
        /// Only those of this namespace.
        #[arg(short, long)]
        namespace: Option<String>,
    },
    /// Show what a name resolves to, step by step along a pod's search path.
    Resolve {
        /// The name, as a program in a pod would ask for it.
        name: String,
        /// Record type.
        #[arg(value_name = "TYPE", default_value = "A")]
        kind: String,
        /// Namespace of the pod that asks.
        #[arg(short, long, default_value = "default")]
        namespace: String,
        /// The pod that asks: NAMESPACE/NAME, or NAME in the namespace.
        #[arg(long)]
        pod: Option<String>,
    },
    /// Show where a pod's calls to a Service go, and why.
    Trace {
        /// A pod on this node: NAMESPACE/NAME, or NAME in `default`.
        pod: String,
        /// NAME or NAME.NAMESPACE, and a port by number or name.
        #[arg(value_name = "SERVICE[:PORT]")]
        service: String,
    },
}

fn print(text: &str) {
    // Whoever closed it has read enough.
    drop(writeln!(std::io::stdout(), "{}", text.trim_end()));
}

#[allow(clippy::print_stderr)]
fn complain(text: &str) {
    eprintln!("edgemesh: {}", text.trim_end());
}

fn main() -> ExitCode {
    let arguments = match Arguments::try_parse() {
        Ok(arguments) => arguments,
        Err(error) => {
            let asked_for = matches!(error.kind(), ErrorKind::DisplayHelp | ErrorKind::DisplayVersion);
            // Help goes to the standard output, errors to the other; one that is closed is nobody's loss.
            drop(error.print());
            return if asked_for { ExitCode::SUCCESS } else { ExitCode::from(USAGE) };
        }
    };
    match act(&arguments) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            complain(&error.to_string());
            match error {
                AgentError::Usage(_) => ExitCode::from(USAGE),
                _ => ExitCode::FAILURE,
            }
        }
    }
}

/// Whether what was asked for is there.
fn act(arguments: &Arguments) -> Result<bool, AgentError> {
    let agent = Agent::at(&arguments.agent)?;
    let (page, shown, good) = match &arguments.action {
        Action::Services { namespace } => {
            let page = agent.get("/debug/services", &[("namespace", namespace.as_deref().unwrap_or_default())])?;
            let shown = show::services(&page);
            (page, shown, true)
        }
        Action::Resolve { name, kind, namespace, pod } => {
            let pod = pod.as_deref().unwrap_or_default();
            let parameters = [("name", name.as_str()), ("type", kind), ("namespace", namespace), ("pod", pod)];
            let page = agent.get("/debug/resolve", &parameters)?;
            let (shown, good) = (show::resolve(&page), page["found"] == true);
            (page, shown, good)
        }
        Action::Trace { pod, service } => {
            let (service, port) = service.split_once(':').unwrap_or((service, ""));
            let page = agent.get("/debug/trace", &[("pod", pod), ("service", service), ("port", port)])?;
            let (shown, good) = (show::trace(&page), show::every_port_has_an_endpoint(&page));
            (page, shown, good)
        }
    };
    print(&if arguments.output == Format::Json { format!("{page:#}") } else { shown });
    Ok(good)
}
