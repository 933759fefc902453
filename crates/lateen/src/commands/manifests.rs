//! `apply`, `delete`, `validate`.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use api::{Positions, ReadOptions};
use clap::Args;
use node::client::uri;
use node::files::{Manifests, read_text};
use node::server::{Kept, Named, Report};
use serde_json::Value;
use types::{Finding, ObjectRef, Severity};

use super::{block_on, client, target};
use crate::cli::{ExitWith, Format, MeshArgs, exit};
use crate::output;

/// Reads `-f` arguments: files, folders, `-`. Names and texts.
pub(crate) fn read_inputs(paths: &[PathBuf]) -> Result<Vec<(String, String)>> {
    let cannot = |path: &Path| format!("cannot read {}", path.display());
    let mut out = Vec::new();
    for path in paths {
        if path.as_os_str() == "-" {
            out.push(("-".to_owned(), super::read_stdin()?));
            continue;
        }
        let found = Manifests::below(path);
        if let Some((path, error)) = found.unreadable.into_iter().next() {
            return Err(error).with_context(|| cannot(&path));
        }
        for file in found.files {
            let text = std::fs::File::open(&file).and_then(read_text).with_context(|| cannot(&file))?;
            out.push((file.display().to_string(), text));
        }
    }
    Ok(out)
}

fn parse(name: &str, text: &str, namespace: &str) -> api::Documents {
    api::parse_documents_with(name, text, ReadOptions { default_namespace: namespace, ..ReadOptions::default() })
}

fn grave(findings: &[Finding]) -> usize {
    findings.iter().filter(|finding| finding.severity == Severity::Error).count()
}

/// Applies manifests.
#[derive(Args, Debug)]
pub(crate) struct ApplyArgs {
    #[command(flatten)]
    mesh: MeshArgs,
    /// File, folder, or `-`.
    #[arg(short = 'f', long = "filename", required = true, value_name = "PATH")]
    files: Vec<PathBuf>,
    /// Namespace of objects that name none.
    #[arg(short, long, default_value = "default")]
    namespace: String,
    /// Say what would happen.
    #[arg(long)]
    dry_run: bool,
    /// Seconds to wait until every proxy runs what is applied.
    #[arg(long, default_value = "10", value_parser = crate::cli::seconds)]
    timeout: u64,
}

pub(crate) fn apply(args: &ApplyArgs) -> Result<()> {
    let inputs = read_inputs(&args.files)?;
    let client = client(&args.mesh)?;
    let mut refused = 0;
    let mut has_said = false;
    let mut applied = BTreeMap::new();
    for (name, text) in inputs {
        let parsed = parse(&name, &text, &args.namespace).objects;
        applied.extend(parsed.into_iter().map(|parsed| (parsed.object.reference(), parsed.positions)));
        let dry_run = args.dry_run.to_string();
        let uri = uri(&["objects"], &[("file", &name), ("namespace", &args.namespace), ("dryRun", &dry_run)]);
        let mut report: Report = block_on(async { Ok(client.post(&uri, text.into_bytes()).await?) })?;
        for finding in report.findings.iter_mut().filter(|finding| finding.position.is_none()) {
            let positions = finding.object.as_ref().and_then(|object| applied.get(object));
            finding.position = positions.map(|positions: &Positions| positions.at(&finding.field));
        }
        for outcome in &report.outcomes {
            let object = &outcome.object;
            output::line(&format!("{}/{} {}", super::resource_named(&object.kind), object.name, outcome.action));
        }
        output::findings(&report.findings);
        refused += grave(&report.findings);
        has_said |= !(report.outcomes.is_empty() && report.findings.is_empty());
    }
    if !has_said {
        bail!("there is no object to apply");
    }
    if !args.dry_run && !applied.is_empty() {
        block_on(settle(args, &applied))?;
    }
    if refused > 0 {
        return Err(ExitWith {
            code: exit::ERROR,
            message: format!("{}; the last good versions stay", errors(refused)),
        }
        .into());
    }
    Ok(())
}

/// Waits until every proxy runs what was applied, and says what the mesh finds wrong with it. What
/// takes longer, or cannot be asked, is a remark: the objects are admitted.
async fn settle(args: &ApplyArgs, applied: &BTreeMap<ObjectRef, Positions>) -> Result<()> {
    if let Err(error) = super::synced(&args.mesh, args.timeout).await {
        output::note(&format!("admitted, but {error:#}"));
        return Ok(());
    }
    let mut findings = super::mesh_findings(&args.mesh).await?;
    findings.retain_mut(|finding| {
        let Some(positions) = finding.object.as_ref().and_then(|object| applied.get(object)) else { return false };
        finding.position = Some(positions.at(&finding.field));
        true
    });
    output::findings(&findings);
    Ok(())
}

/// Deletes objects.
#[derive(Args, Debug)]
pub(crate) struct DeleteArgs {
    #[command(flatten)]
    mesh: MeshArgs,
    /// File, folder, or `-`: everything in it.
    #[arg(short = 'f', long = "filename", value_name = "PATH")]
    files: Vec<PathBuf>,
    /// `KIND/NAME`, or `KIND NAME…`.
    objects: Vec<String>,
    /// What is not there is no error.
    #[arg(long)]
    ignore_not_found: bool,
    /// Namespace.
    #[arg(short, long, default_value = "default")]
    namespace: String,
}

pub(crate) fn delete(args: &DeleteArgs) -> Result<()> {
    let mut wanted: Vec<Named> = Vec::new();
    let mut has_failed = false;
    for (name, text) in read_inputs(&args.files)? {
        let documents = parse(&name, &text, &args.namespace);
        if documents.is_incomplete {
            // Nobody knows which objects these are.
            output::findings(&documents.findings);
            has_failed = true;
        }
        // A name is enough to delete by: what would not be admitted (any more) goes too.
        let refused = documents.refused.into_iter().map(|refused| (refused.kind, refused.object));
        let admitted = documents.objects.into_iter().map(|parsed| (parsed.object.kind, parsed.object.reference()));
        // Two groups have a kind `Gateway`; plurals are of one kind each.
        wanted.extend(refused.chain(admitted).rev().map(|(kind, object)| Named {
            kind: kind.info().plural.to_owned(),
            namespace: object.namespace.into(),
            name: object.name.into(),
        }));
    }
    let named = |kind: &str, name: &str| Named {
        kind: kind.to_owned(),
        namespace: args.namespace.clone(),
        name: name.to_owned(),
    };
    match args.objects.as_slice() {
        [] => {}
        [kind, names @ ..] if !kind.contains('/') => {
            if names.iter().all(String::is_empty) {
                let message = format!("delete {kind}: which one? give KIND/NAME");
                return Err(ExitWith { code: exit::USAGE, message }.into());
            }
            wanted.extend(names.iter().map(|name| named(kind, name)));
        }
        pairs => {
            for pair in pairs {
                let (kind, name) = target(pair)?;
                wanted.push(named(kind, name));
            }
        }
    }
    if wanted.is_empty() && has_failed {
        return Err(ExitWith { code: exit::ERROR, message: String::new() }.into());
    }
    if wanted.is_empty() {
        let message = "nothing to delete: give KIND/NAME or -f PATH".to_owned();
        return Err(ExitWith { code: exit::USAGE, message }.into());
    }
    let body = serde_json::to_vec(&wanted)?;
    let client = client(&args.mesh)?;
    let kept: Vec<Option<Kept>> = block_on(async { Ok(client.post("/objects/delete", body).await?) })?;
    for (named, kept) in wanted.iter().zip(kept) {
        match kept {
            None => output::line(&format!("{} {:?} deleted", super::resource_named(&named.kind), named.name)),
            Some(kept) if kept.is_missing && args.ignore_not_found => {}
            Some(kept) => {
                output::error(&kept.message);
                has_failed = true;
            }
        }
    }
    if has_failed {
        return Err(ExitWith { code: exit::ERROR, message: String::new() }.into());
    }
    Ok(())
}

/// Checks manifests.
#[derive(Args, Debug)]
pub(crate) struct ValidateArgs {
    /// File, folder, or `-`.
    #[arg(short = 'f', long = "filename", required = true, value_name = "PATH")]
    files: Vec<PathBuf>,
    /// `json` or `yaml` prints the findings.
    #[arg(short, long, value_enum, default_value = "table")]
    output: Format,
}

pub(crate) fn validate(args: &ValidateArgs) -> Result<()> {
    let mut refused = 0;
    let mut unread = false;
    let mut all: Vec<Finding> = Vec::new();
    let inputs = read_inputs(&args.files)?;
    let is_table = !matches!(args.output, Format::Json | Format::Yaml);
    for (name, text) in inputs {
        let documents = api::parse_documents(&name, &text);
        unread |= documents.findings.iter().any(|finding| *finding.code == *api::codes::SYNTAX);
        let errors = grave(&documents.findings);
        refused += errors;
        if is_table {
            output::findings(&documents.findings);
            if errors == 0 {
                output::line(&format!("\"{name}\" is valid"));
            }
        }
        all.extend(documents.findings);
    }
    let value = serde_json::to_value(&all).unwrap_or(Value::Null);
    match args.output {
        Format::Json => output::json(&value),
        Format::Yaml => output::yaml(&value),
        Format::Table | Format::Wide | Format::Name => {}
    }
    match refused {
        0 => Ok(()),
        count => {
            let code = if unread { exit::DATA } else { exit::ERROR };
            Err(ExitWith { code, message: errors(count) }.into())
        }
    }
}

/// `1 error`, `2 errors`.
pub(crate) fn errors(count: usize) -> String {
    if count == 1 { "1 error".to_owned() } else { format!("{count} errors") }
}
