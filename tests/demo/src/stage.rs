//! Where scenes happen: runs the lab's commands, shows each with its answer and its time, and waits for conditions.

use std::{
    io::Write,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, anyhow, ensure};
use serde_json::Value;

/// Most lines of an answer that are shown.
const SHOWN_LINES: usize = 16;

/// What a command said.
#[derive(Debug, Clone)]
pub struct Answer {
    /// Its exit code; 255 when it was killed.
    pub code: i32,
    /// Standard output, then standard error.
    pub text: String,
    /// How long it took.
    pub took: Duration,
}

impl Answer {
    /// The text, if the command succeeded.
    ///
    /// # Errors
    /// When it failed.
    pub fn ok(self) -> Result<String> {
        ensure!(self.code == 0, "exit code {}: {}", self.code, self.text.trim());
        Ok(self.text)
    }

    /// The text, if the command failed.
    ///
    /// # Errors
    /// When it succeeded.
    pub fn failed(self) -> Result<String> {
        ensure!(self.code != 0, "this should have failed: {}", self.text.trim());
        Ok(self.text)
    }
}

/// A lab with somebody watching.
#[derive(Debug, Clone)]
pub struct Stage {
    lab: PathBuf,
    programs: PathBuf,
    id: String,
    root: PathBuf,
    shown: bool,
}

impl Stage {
    /// A stage on the lab `id`; `root` is the checkout.
    pub fn new(root: &Path, programs: &Path, id: &str) -> Self {
        let lab = programs.join("lab");
        Self { lab, programs: programs.to_owned(), id: id.to_owned(), root: root.to_owned(), shown: true }
    }

    /// The same stage with nobody watching.
    #[must_use]
    pub fn unseen(&self) -> Self {
        Self { shown: false, ..self.clone() }
    }

    /// Whether somebody is watching.
    pub fn is_shown(&self) -> bool {
        self.shown
    }

    /// The checkout.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Path of one of the project's programs.
    pub fn program(&self, name: &str) -> String {
        self.programs.join(name).display().to_string()
    }

    /// Tells the audience something.
    #[allow(clippy::print_stdout)]
    pub fn say(&self, text: &str) {
        if self.shown {
            println!("{text}");
        }
    }

    /// Runs `./lab` with `words`.
    ///
    /// # Errors
    /// When it can't be started.
    pub fn lab(&self, words: &[&str]) -> Result<Answer> {
        self.lab_with_input(words, "")
    }

    /// [`Stage::lab`] with `input` on its standard input.
    ///
    /// # Errors
    /// When it can't be started.
    pub fn lab_with_input(&self, words: &[&str], input: &str) -> Result<Answer> {
        let quoted: Vec<_> = words.iter().map(|word| quote(word)).collect();
        self.say(&format!("  $ ./lab {}", quoted.join(" ")));
        let begin = Instant::now();
        let mut child = Command::new(&self.lab)
            .args(words)
            .env("EDGEMESH_LAB", &self.id)
            .env("EDGEMESH_BIN", &self.programs)
            .env("EDGEMESH_IMAGES_SCRIPT", self.root.join("scripts/build-images.sh"))
            .current_dir(&self.root)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .with_context(|| self.lab.display().to_string())?;
        let stdin = child.stdin.take();
        let output = thread::scope(|scope| {
            scope.spawn(move || {
                // A program that doesn't read its input closes it.
                stdin.map(|mut stdin| stdin.write_all(input.as_bytes()))
            });
            child.wait_with_output()
        })?;
        let took = begin.elapsed();
        let mut text = String::from_utf8_lossy(&output.stdout).into_owned();
        text.push_str(&String::from_utf8_lossy(&output.stderr));
        let answer = Answer { code: output.status.code().unwrap_or(255), text, took };
        self.show(&answer);
        Ok(answer)
    }

    fn show(&self, answer: &Answer) {
        let lines: Vec<_> = answer.text.trim_end().lines().collect();
        for line in lines.iter().take(SHOWN_LINES) {
            self.say(&format!("    {}", line.chars().take(200).collect::<String>()));
        }
        if lines.len() > SHOWN_LINES {
            self.say(&format!("    … {} more lines", lines.len() - SHOWN_LINES));
        }
        let code = if answer.code == 0 { String::new() } else { format!(", exit code {}", answer.code) };
        self.say(&format!("    ({} ms{code})", answer.took.as_millis()));
    }

    /// Runs kubectl as the cluster's admin; `words` are split at spaces.
    ///
    /// # Errors
    /// When it can't be started.
    pub fn kubectl(&self, words: &str) -> Result<Answer> {
        let mut all = vec!["kubectl"];
        all.extend(words.split_whitespace());
        self.lab(&all)
    }

    /// Runs kubectl with a manifest on its standard input.
    ///
    /// # Errors
    /// When it can't be started.
    pub fn kubectl_with(&self, words: &str, manifest: &str) -> Result<Answer> {
        let mut all = vec!["kubectl"];
        all.extend(words.split_whitespace());
        self.lab_with_input(&all, manifest)
    }

    /// An object or list of the cluster's API as JSON, unseen.
    ///
    /// # Errors
    /// When kubectl fails.
    pub fn json(&self, words: &str) -> Result<Value> {
        let text = self.unseen().kubectl(&format!("get {words} -o json"))?.ok()?;
        Ok(serde_json::from_str(&text)?)
    }

    /// A GET on a node's own HTTP endpoint, unseen.
    ///
    /// # Errors
    /// When it doesn't answer with 2xx.
    pub fn get_on(&self, node: &str, url: &str) -> Result<String> {
        self.unseen().lab(&["node", node, "--", "curl", "-sSf", "--max-time", "5", url])?.ok()
    }

    /// Runs a shell line in a pod.
    ///
    /// # Errors
    /// When it can't be started.
    pub fn in_pod(&self, pod: &str, line: &str) -> Result<Answer> {
        self.lab(&["pod", pod, "--", "/bin/sh", "-c", line])
    }

    /// Tries until it succeeds, which must be before the deadline.
    ///
    /// # Errors
    /// The last failure, once the deadline passed.
    pub fn until<T>(&self, what: &str, deadline: Duration, mut attempt: impl FnMut(&Self) -> Result<T>) -> Result<T> {
        let begin = Instant::now();
        let unseen = self.unseen();
        loop {
            match attempt(&unseen) {
                Ok(value) => {
                    let took = begin.elapsed();
                    ensure!(
                        took <= deadline,
                        "within {:.1} s, not {} s: {what}",
                        took.as_secs_f64(),
                        deadline.as_secs()
                    );
                    self.say(&format!("    {what}: after {:.1} s", took.as_secs_f64()));
                    return Ok(value);
                }
                Err(error) if begin.elapsed() > deadline => {
                    return Err(error.context(anyhow!("not within {} s: {what}", deadline.as_secs())));
                }
                Err(_) => thread::sleep(Duration::from_millis(50)),
            }
        }
    }
}

fn quote(word: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_./=:,@%+".contains(c);
    if word.chars().all(plain) && !word.is_empty() { word.to_owned() } else { format!("'{word}'") }
}
