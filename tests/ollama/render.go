// Renders conversations through templates as Ollama does, and finds the marks that it reads from a template.
// Standard input: [{"template", "prompts": [{"System", "Messages", ...}]}]. Standard output: [{"texts", "call", "thought"}].
package main

import (
	"encoding/json"
	"os"
	"strings"
	"text/template"
	"text/template/parse"
)

type arguments map[string]any
type function map[string]any

func compact(value any) string {
	text, _ := json.Marshal(value)
	return string(text)
}
func (a arguments) String() string { return compact(map[string]any(a)) }
func (f function) String() string  { return compact(map[string]any(f)) }

type call struct {
	Function struct {
		Name      string
		Arguments arguments
	}
}
type message struct {
	Role, Content, Thinking string
	ToolCalls               []call
}
type tool struct{ Function function }
type prompt struct {
	System            string
	Messages          []message
	Tools             []tool
	IsThinkSet, Think bool
}
type job struct {
	Template string
	Prompts  []prompt
}
type rendered struct {
	Texts   []string  `json:"texts"`
	Call    string    `json:"call"`
	Thought [2]string `json:"thought"`
}

func main() {
	var jobs []job
	must(json.NewDecoder(os.Stdin).Decode(&jobs))
	results := []rendered{}
	for _, j := range jobs {
		parsed, err := template.New("").Option("missingkey=zero").Parse(j.Template)
		must(err)
		result := rendered{Texts: []string{}}
		for _, p := range j.Prompts {
			var text strings.Builder
			must(parsed.Execute(&text, map[string]any{
				"System": p.System, "Messages": p.Messages, "Tools": p.Tools, "IsThinkSet": p.IsThinkSet, "Think": p.Think,
			}))
			result.Texts = append(result.Texts, text.String())
		}
		if found := ifCalls(parsed.Root); found != nil {
			text, _ := firstText(found.List)
			result.Call = strings.Split(strings.TrimSpace(text), "{")[0]
		}
		aroundThought(parsed.Root, &result.Thought)
		results = append(results, result)
	}
	must(json.NewEncoder(os.Stdout).Encode(results))
}

func must(err error) {
	if err != nil {
		panic(err)
	}
}

// The lists within a node.
func lists(node parse.Node) []*parse.ListNode {
	var branch *parse.BranchNode
	switch n := node.(type) {
	case *parse.IfNode:
		branch = &n.BranchNode
	case *parse.RangeNode:
		branch = &n.BranchNode
	default:
		return nil
	}
	if branch.ElseList == nil {
		return []*parse.ListNode{branch.List}
	}
	return []*parse.ListNode{branch.List, branch.ElseList}
}

// The first `if` whose condition has the field .ToolCalls itself.
func ifCalls(list *parse.ListNode) *parse.IfNode {
	for _, node := range list.Nodes {
		if n, ok := node.(*parse.IfNode); ok && hasField(n.Pipe, "ToolCalls", false) {
			return n
		}
		for _, inner := range lists(node) {
			if found := ifCalls(inner); found != nil {
				return found
			}
		}
	}
	return nil
}

// The first text, unless an action comes before it.
func firstText(list *parse.ListNode) (string, bool) {
	for _, node := range list.Nodes {
		if n, ok := node.(*parse.TextNode); ok {
			return string(n.Text), true
		}
		for _, inner := range lists(node) {
			if text, ok := firstText(inner); ok {
				return text, true
			}
		}
		return "", false
	}
	return "", false
}

// The texts at both ends of the list that writes .Thinking.
func aroundThought(list *parse.ListNode, around *[2]string) {
	for _, node := range list.Nodes {
		if n, ok := node.(*parse.ActionNode); ok && hasField(n.Pipe, "Thinking", true) {
			for side, end := range []parse.Node{list.Nodes[0], list.Nodes[len(list.Nodes)-1]} {
				if text, ok := end.(*parse.TextNode); ok {
					around[side] = strings.TrimSpace(string(text.Text))
				}
			}
		}
		for _, inner := range lists(node) {
			aroundThought(inner, around)
		}
	}
}

func hasField(pipe *parse.PipeNode, name string, nested bool) bool {
	for _, command := range pipe.Cmds {
		for _, argument := range command.Args {
			switch a := argument.(type) {
			case *parse.FieldNode:
				if a.Ident[0] == name {
					return true
				}
			case *parse.PipeNode:
				if nested && hasField(a, name, true) {
					return true
				}
			}
		}
	}
	return false
}
